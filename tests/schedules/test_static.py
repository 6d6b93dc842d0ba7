"""Which plan holds when: the curves against the paper's equations, and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.nets import NETS

import fxlocal
from fxlocal import Freeze, Hebbian, LocalPrefix, Plan, PlanError
from fxlocal.schedules import Constant, Static

CURVES = ["linear", "quadratic", "exponential", "step"]


class Model:
    """All that a schedule may read of an analysis: so many layers, and the block edges."""

    def __init__(self, num_layers, boundaries=None):
        self.layers = tuple(range(num_layers))
        self.boundaries = tuple(range(num_layers)) if boundaries is None else boundaries


def boundary_of(plan):
    return plan.local.until if plan.local else 0


def boundaries(schedule, model):
    return [boundary_of(schedule.plan(model, epoch)) for epoch in range(schedule.epochs)]


# --- the equations (LoCal+SGD, eq. 2 to 4) -------------------------------------------------------


def by_hand(curve, c1, c2, last):
    curves = {
        "linear": lambda e: c1 * last + c2 * e,
        "quadratic": lambda e: c1 - c2 * (e - last) ** 2,
        "exponential": lambda e: math.exp(c2 * e) - c1 * last,
        "step": lambda e: c1 if e > c2 else 0,
    }
    return [math.floor(max(curves[curve](epoch), 0)) for epoch in range(1, last + 1)]


RAW = [
    ("linear", -0.5, 1.75, [0, 0, 0, 2, 3, 5, 7, 9, 10, 12]),
    ("quadratic", 12.0, 0.25, [0, 0, 0, 3, 5, 8, 9, 11, 11, 12]),
    ("exponential", 0.5, 0.28125, [0, 0, 0, 0, 0, 0, 2, 4, 7, 11]),
    ("step", 9.0, 3.5, [0, 0, 0, 9, 9, 9, 9, 9, 9, 9]),
]


@pytest.mark.parametrize("curve,c1,c2,expected", RAW)
def test_raw_parameters_give_the_papers_curve(curve, c1, c2, expected):
    schedule = Static(epochs=10, curve=curve, c1=c1, c2=c2, align=False)
    assert boundaries(schedule, Model(40)) == expected == by_hand(curve, c1, c2, 10)


@pytest.mark.parametrize(
    "curve,c1,c2",
    [("linear", -8 / 15 * 0.25, 8 / 15), ("quadratic", 8.0, 8 / 15**2), ("step", 8.0, 5.0)],
)
def test_readable_parameters_are_raw_ones_derived(curve, c1, c2):
    """L = 20 layers, 40 % of them, from a quarter of 20 epochs on."""
    readable = Static(epochs=20, curve=curve, largest=0.4, start=0.25, align=False)
    raw = Static(epochs=20, curve=curve, c1=c1, c2=c2, align=False)
    # both sides of a floor: no value but the ends falls on a whole number
    assert boundaries(readable, Model(20))[:-1] == boundaries(raw, Model(20))[:-1]
    assert boundaries(readable, Model(20))[-1] == 8


def test_readable_exponential_passes_through_start_and_largest():
    schedule = Static(epochs=20, curve="exponential", largest=0.4, start=0.25, align=False)
    c1, c2 = schedule._derive(20)
    assert math.exp(c2 * 5) - c1 * 20 == pytest.approx(0, abs=1e-9)
    assert math.exp(c2 * 20) - c1 * 20 == pytest.approx(8)
    raw = Static(epochs=20, curve="exponential", c1=c1, c2=c2, align=False)
    assert boundaries(schedule, Model(20)) == boundaries(raw, Model(20))


READABLE = st.builds(
    Static,
    epochs=st.one_of(st.integers(1, 60), st.just(1000)),
    curve=st.sampled_from(CURVES),
    largest=st.floats(0.01, 0.99),
    start=st.floats(0, 0.99),
    align=st.booleans(),
)


@given(READABLE, st.integers(1, 200))
def test_readable_curves_keep_what_they_promise(schedule, num_layers):
    model = Model(num_layers, tuple(range(0, num_layers, 3)))
    found = boundaries(schedule, model)
    assert found == sorted(found), "the boundary moved left"
    for epoch, boundary in enumerate(found, start=1):
        if epoch <= schedule.start * schedule.epochs:
            assert boundary == 0
    most = math.floor(schedule.largest * num_layers + 1e-6)
    assert max(found) <= most
    if not schedule.align:
        assert found[-1] in (most, most - 1) if num_layers > 1 else found[-1] == 0
    else:
        assert set(found) <= set(model.boundaries)


@given(
    st.sampled_from(CURVES),
    st.floats(-50, 50),
    st.floats(0, 5),
    st.integers(1, 60),
    st.integers(1, 200),
)
def test_raw_curves_never_move_left_nor_past_the_last_layer(curve, c1, c2, epochs, num_layers):
    schedule = Static(epochs=epochs, curve=curve, c1=c1, c2=c2, align=False)
    found = boundaries(schedule, Model(num_layers))
    assert found == sorted(found)
    assert found[0] >= 0 and found[-1] <= num_layers - 1


# --- on a model ----------------------------------------------------------------------------------


def test_boundary_snaps_down_to_a_block_edge_unless_told_otherwise():
    model = Model(10, (0, 1, 3, 6))
    aligned = Static(epochs=8, curve="linear", largest=0.8, start=0)
    free = Static(epochs=8, curve="linear", largest=0.8, start=0, align=False)
    assert boundaries(free, model) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert boundaries(aligned, model) == [1, 1, 3, 3, 3, 6, 6, 6]


# Without align any layer may be asked for, one between two calls of a shared layer too: refused.
RUNS = [(name, align) for name in NETS for align in (True, False) if align or name != "shared"]


@pytest.mark.sample(14)
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("name,align", RUNS)
def test_each_plan_of_a_run_fits_the_model(name, align, curve):
    model = NETS[name].build()
    captured = fxlocal.capture(model)
    analysis = fxlocal.analyze(captured)
    schedule = Static(epochs=6, curve=curve, largest=0.9, start=0.2, rule=Freeze(), align=align)
    for plan in {schedule.plan(analysis, epoch) for epoch in range(6)}:
        fxlocal.transform(captured, plan)


def test_plan_has_the_rule_and_the_norm():
    schedule = Static(epochs=2, start=0, rule=Freeze(), norm="eval", align=False)
    assert schedule.plan(Model(10), 1) == Plan(local=LocalPrefix(6, Freeze(), "eval"))


@pytest.mark.parametrize("align", [True, False])
def test_the_boundary_of_an_epoch_is_the_plans(align):
    model, schedule = Model(20, (0, 3, 9)), Static(epochs=6, align=align)
    found = [schedule.boundary(model, epoch) for epoch in range(8)]
    assert found == [boundary_of(schedule.plan(model, epoch)) for epoch in range(8)]
    assert found[-1] == (9 if align else 12)


def test_epochs_past_the_last_keep_its_boundary():
    schedule = Static(epochs=4, largest=0.5, align=False)
    assert schedule.plan(Model(10), 50) == schedule.plan(Model(10), 3)
    assert boundary_of(schedule.plan(Model(10), 3)) == 5


def test_step_and_rank_make_no_difference():
    schedule = Static(epochs=4)
    assert schedule.plan(Model(10), 3, step=7, rank=2) == schedule.plan(Model(10), 3)


def test_rate_decays_every_so_many_epochs():
    schedule = Static(
        epochs=10, start=0, largest=0.5, rule=Hebbian(1.0), rate_decay=(0.5, 3), align=False
    )
    rates = [schedule.plan(Model(40), epoch).rate for epoch in range(10)]
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]


def test_rate_decay_leaves_a_rule_without_rate_alone():
    schedule = Static(epochs=4, rule=Freeze(), rate_decay=(0.5, 1), align=False)
    assert schedule.plan(Model(10), 3).local.rule == Freeze()


def test_constant_is_the_same_plan_in_every_step():
    plan = Plan(local=LocalPrefix("fc"))
    assert Constant(plan).plan(Model(3), 0) is plan
    assert Constant(plan).plan(Model(3), 99, step=5, rank=1) is plan
    assert Constant().plan(Model(3), 0) == Plan()


def test_schedules_are_told_apart_by_their_repr():
    schedules = [Static(3), Static(4), Static(3, curve="linear"), Static(3, rule=Hebbian(1.0))]
    assert len({repr(schedule) for schedule in schedules}) == 4


# --- refusals ------------------------------------------------------------------------------------

REFUSED = [
    ({"curve": "cubic"}, "curve='cubic': give one of linear, quadratic, exponential, step"),
    ({"epochs": 0}, "epochs=0: give a whole number from 1"),
    ({"epochs": 2.5}, "epochs=2.5: give a whole number"),
    ({"epochs": True}, "epochs=True: give a whole number"),
    ({"largest": 0}, r"largest=0: a fraction of the layers, in \(0, 1\)"),
    ({"largest": 1.0}, "largest=1.0: a fraction"),
    ({"largest": float("nan")}, "largest=nan: a fraction"),
    ({"start": 1.0}, r"start=1.0: a fraction of the epochs, in \[0, 1\)"),
    ({"start": -0.1}, "start=-0.1: a fraction"),
    ({"c1": 1.0}, "c1=1.0, c2=None: give both or neither"),
    ({"c2": 1.0}, "c1=None, c2=1.0: give both or neither"),
    ({"c1": float("inf"), "c2": 1.0}, "c1=inf: give a finite number"),
    ({"c1": 1.0, "c2": float("nan")}, "c2=nan: give a finite number"),
    ({"c1": 1.0, "c2": -0.5}, "c2=-0.5: at least 0, else the boundary would move left"),
    ({"rate_decay": (0.0, 3)}, r"rate_decay=\(0.0, 3\): give \(factor in \(0, 1\]"),
    ({"rate_decay": (1.5, 3)}, "rate_decay="),
    ({"rate_decay": (0.5, 0)}, "rate_decay="),
    ({"rate_decay": (0.5, 1.5)}, "rate_decay="),
    ({"rate_decay": (0.5,)}, "rate_decay="),
    ({"rate_decay": 0.5}, "rate_decay="),
    ({"rule": "hebbian"}, "rule='hebbian': give Hebbian"),
    ({"norm": "frozen"}, "norm='frozen': give 'train' or 'eval'"),
    ({"rate_decay": ("a", 1)}, r"rate_decay=\('a', 1\): give"),
    ({"rate_decay": (0.5, None)}, "rate_decay="),
    ({"rate_decay": (True, 1)}, "rate_decay="),
    ({"align": 1}, "align=1: give True or False"),
    ({"weak_supervision": "no"}, "weak_supervision='no': give True or False"),
]


@pytest.mark.parametrize("arguments,message", REFUSED, ids=lambda value: str(value)[:30])
def test_static_refuses(arguments, message):
    with pytest.raises(PlanError, match=message):
        Static(**{"epochs": 10, **arguments})


# --- within an epoch -----------------------------------------------------------------------------


def test_steps_take_turns_between_update_freeze_and_the_whole_network():
    facts = Model(10)
    schedule = Static(2, start=0, rule=Hebbian(0.1), update_every=2, refresh_every=5)
    kinds = [schedule.plan(facts, 1, step).local for step in range(10)]
    assert [local and type(local.rule).__name__ for local in kinds] == [
        *("Hebbian", "Freeze", "Hebbian", "Freeze", None),
        *("Freeze", "Hebbian", "Freeze", "Hebbian", None),
    ]
    assert {local.until for local in kinds if local} == {6}


@pytest.mark.parametrize("name", ["update_every", "refresh_every"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_count_of_steps_is_refused_below_one(name, value):
    with pytest.raises(PlanError, match=f"{name}="):
        Static(2, **{name: value})
