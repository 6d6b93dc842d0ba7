"""Approximation schedules: which layer, step and rank has which method; two schedules in one."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.nets import NETS
from torch import nn

import fxlocal
from fxlocal import Freeze, Full, LocalModules, LocalPrefix, Plan, PlanError, Random, TopK, Zero
from fxlocal.facts import Layer
from fxlocal.schedules import (
    NAMED,
    Approximation,
    Constant,
    Dynamic,
    LearningSchedule,
    Plateau,
    Static,
    Table,
    combine,
)


class Facts:
    """So many convolutions, c0, c1, ..., and a linear layer."""

    def __init__(self, num_convs):
        convs = [Layer(i, f"c{i}", "conv", f"n{i}", f"c{i}.weight", "x") for i in range(num_convs)]
        head = Layer(num_convs, "fc", "linear", "fc", "fc.weight", "x")
        self.layers, self.boundaries = (*convs, head), tuple(range(num_convs + 1))

    def boundary(self, until):
        return until


SIX = Facts(6)


def cells(schedule, num_steps, facts=SIX, rank=0):
    """The approximated (convolution, step) pairs."""
    plans = [schedule.plan(facts, 0, step, rank) for step in range(num_steps)]
    paths = [layer.path for layer in facts.layers]
    return {(paths.index(path), step) for step, p in enumerate(plans) for path in p.weight_grads}


# --- Approximation -------------------------------------------------------------------------------

CELLS = {
    "schedule-1": {(1, 0), (5, 0), (1, 1), (5, 1), (1, 2), (5, 2), (1, 3), (5, 3), (1, 4), (5, 4)},
    "schedule-2": {(1, 0), (3, 0), (5, 0), (1, 2), (3, 2), (5, 2), (1, 4), (3, 4), (5, 4)},
    "schedule-3": {(conv, step) for conv in range(6) for step in (0, 4)},
    "schedule-3-but-first": {(conv, step) for conv in range(1, 6) for step in (0, 4)},
    "cnn2": {(1, 0), (1, 2), (1, 4)},
}


def test_every_named_schedule_is_written_out_here():
    assert tuple(CELLS) == NAMED


@pytest.mark.parametrize("name", CELLS)
def test_a_named_schedule_is_the_papers(name):
    schedule = Approximation.named(name, TopK(1))
    assert cells(schedule, 5) == CELLS[name]
    assert set(schedule.plan(SIX, 0).weight_grads.values()) == {TopK(1)}
    assert schedule.plan(SIX, 7, 3) == schedule.plan(SIX, 0, 3)  # the same in every epoch


def test_schedule_1_approximates_as_many_layers_as_the_paper_says():
    """Section 3: four layers of VGG-19, five of ResNet-20."""
    schedule = Approximation.named("schedule-1", Zero())
    assert len(cells(schedule, 1, Facts(16))) == 4
    assert len(cells(schedule, 1, Facts(19))) == 5


def test_the_default_is_schedule_1():
    assert Approximation(Zero()) == Approximation.named("schedule-1", Zero())


LAYERS = [
    (slice(None), {1, 2, 3, 4, 5}),
    (slice(None, None, 2), {1, 3, 5}),
    (slice(None, 3), {1, 2}),
    (slice(None, -1), {1, 2, 3, 4}),
    (slice(0, None), {0, 1, 2, 3, 4, 5}),
    (slice(0, None, 3), {0, 3}),
    (slice(0, 1), {0}),
    (slice(2, None, 2), {2, 4}),
    (slice(-2, None), {4, 5}),
    (slice(4, 99), {4, 5}),
]


@pytest.mark.parametrize("layers,expected", LAYERS, ids=str)
def test_layers_are_sliced_and_the_first_one_only_if_asked(layers, expected):
    assert cells(Approximation(Zero(), layers), 1) == {(conv, 0) for conv in expected}


ENDLESS = st.builds(
    lambda start, length, step: slice(start, length and (start or 0) + length, step),
    *(st.none() | st.integers(0, 9), st.none() | st.integers(1, 20)),
    st.none() | st.integers(1, 7),
)


@given(ENDLESS, ENDLESS)
def test_batches_and_ranks_are_slices_of_numbers_without_end(batches, ranks):
    """Of many more numbers than are asked for, Python's own slicing is the oracle."""
    schedule, numbers = Approximation(Zero(), batches=batches, ranks=ranks), range(1000)
    asked = [(step, rank) for step in range(15) for rank in range(15)]
    for step, rank in asked:
        expected = step in numbers[batches] and rank in numbers[ranks]
        assert bool(schedule.plan(SIX, 0, step, rank).weight_grads) == expected


def test_full_is_left_out_of_the_plan():
    assert Approximation(Full(), slice(0, None)).plan(SIX, 0) == Plan()


def test_a_shared_module_is_one_and_a_computed_weight_none():
    shared = fxlocal.analyze(NETS["shared"].build())
    assert [layer.path for layer in shared.layers] == ["stem", "conv", "conv", "fc"]
    every = Approximation(Zero(), slice(0, None))
    assert list(every.plan(shared, 0).weight_grads) == ["stem", "conv"]
    twice = Facts(5)
    twice.layers = (*twice.layers[:2], *twice.layers[1:])  # c0, c1, c1, c2, ...
    assert list(Approximation(Zero(), slice(2, 4)).plan(twice, 0).weight_grads) == ["c2", "c3"]
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), normed, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    assert list(every.plan(fxlocal.analyze(model), 0).weight_grads) == ["0", "2", "3"]


def test_linear_layers_are_no_convolutions():
    analysis = fxlocal.analyze(NETS["residual"].build())
    plan = Approximation(Zero(), slice(0, None)).plan(analysis, 0)
    assert list(plan.weight_grads) == [layer.path for layer in analysis.layers][:-1]


# --- Table ---------------------------------------------------------------------------------------

F, Z, R, A = Full(), Zero(), Random(), TopK(1)
FIGURE_3 = [[F, Z, R, Z], [F, F, R, F], [A, F, R, F], [A, F, F, F], [A, Z, F, Z]]


def test_a_table_says_the_papers_figure_3():
    table = Table(FIGURE_3)
    batches = [
        {"c2": A, "c3": A, "c4": A},
        {"c0": Z, "c4": Z},
        {"c0": R, "c1": R, "c2": R},
        {"c0": Z, "c4": Z},
    ]
    for step, expected in enumerate(batches * 2):
        assert table.plan(Facts(5), 3, step) == Plan(weight_grads=expected)


METHODS = st.sampled_from([F, Z, R, A])
TABLES = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(METHODS, min_size=width, max_size=width), min_size=1)
)


@given(TABLES, st.integers(0, 3), st.integers(0, 30))
def test_a_table_is_periodic_and_has_its_cells(rows, more, step):
    facts, table = Facts(len(rows) + more), Table(rows)
    plan = table.plan(facts, 0, step)
    assert plan == table.plan(facts, 0, step + len(rows[0]))
    for i, layer in enumerate(facts.layers):
        expected = rows[i][step % len(rows[0])] if i < len(rows) else Full()
        assert plan.weight_grads.get(layer.path, Full()) == expected
    assert Full() not in plan.weight_grads.values()


def test_tables_by_rank():
    odd = Table([[Z], [R]], ranks=slice(1, None, 2))
    even = Table([[R], [F]], ranks=slice(None, None, 2))
    plans = [combine(odd, even).plan(SIX, 0, rank=rank).weight_grads for rank in range(4)]
    assert plans == [{"c0": R}, {"c0": Z, "c1": R}] * 2


def test_schedules_are_values():
    """Hashable, equal, and of a repr to paste, which a checkpoint compares."""
    names = {**vars(fxlocal), **vars(fxlocal.schedules)}
    table, plateau = Table(FIGURE_3, ranks=slice(2)), Plateau(Approximation(A), 5)
    for schedule in (
        *(Approximation(R, slice(2), slice(1, 9, 3), slice(1)), table, plateau),
        *(combine(Approximation(Z), table), combine(plateau, combine(Static(3), table))),
    ):
        again = eval(repr(schedule), names)
        assert again == schedule and hash(again) == hash(schedule)
    assert Approximation(Z, slice(1)) != Approximation(Z, slice(2))
    assert table.cells == tuple(map(tuple, FIGURE_3))


# --- refusals ------------------------------------------------------------------------------------

REFUSED = [
    (lambda: Approximation("zero"), r"method='zero': give Full\(\), Zero\(\), Random\(\) or TopK"),
    (lambda: Approximation(Zero), "method=<class .*Zero'>: give Full"),
    (lambda: Approximation(Z, layers=3), "layers=3: give a slice, such as"),
    (lambda: Approximation(Z, layers=slice(0.5)), r"layers=slice\(.*: 0.5 is no whole number"),
    (lambda: Approximation(Z, slice(True, 3)), "layers=slice.*: True is no whole number"),
    (lambda: Approximation(Z, slice(0, 4, 0)), r"layers=slice\(0, 4, 0\): give a step from 1"),
    (lambda: Approximation(Z, slice(None, None, -1)), "layers=.*: give a step from 1"),
    (lambda: Approximation(Z, batches=2), "batches=2: give a slice"),
    (lambda: Approximation(Z, batches=slice(-1, None)), "batches=.*: steps have no end to count"),
    (lambda: Approximation(Z, batches=slice(-1)), "batches=.*: steps have no end to count back"),
    (lambda: Approximation(Z, batches=slice(0, 9, 0)), "batches=.*: give a step from 1"),
    (lambda: Approximation(Z, batches=slice(4, 4)), "batches=.*: selects no steps"),
    (lambda: Approximation(Z, ranks=slice(0, -1)), "ranks=.*: ranks have no end to count back"),
    (lambda: Approximation(Z, ranks=slice(0)), "ranks=.*: selects no ranks"),
    (
        lambda: Approximation.named("schedule-4", Z),
        "no schedule is named 'schedule-4'. Nearest: 's",
    ),
    (lambda: Approximation.named(Z, "cnn2"), "no schedule is named Zero"),
    (lambda: Approximation.named("cnn2", "zero"), "method='zero': give Full"),
    (lambda: Approximation(Z, slice(6, None)).plan(SIX, 0), "selects none of the .* 6 convol"),
    (lambda: Approximation(Z).plan(Facts(1), 0), "selects none of the model's 1 convolutions"),
    (lambda: Approximation(Z, slice(9), slice(1, 2)).plan(Facts(1), 0), "selects none"),
    (lambda: Approximation(Z, slice(0, None)).plan(Facts(0), 0), "selects none .* 0 convol"),
    (lambda: Table([]), r"cells=\(\): give at least one row"),
    (lambda: Table([[]]), r"cells=\(\(\),\): give at least one row of at least one method"),
    (lambda: Table([[Z, Z], [Z, Z], [Z]]), "row 2 has 1 steps, row 0 has 2"),
    (lambda: Table([[Z, Z], []]), "row 1 has 0 steps, row 0 has 2"),
    (lambda: Table([[Z, Z], [Z, "zero"]]), r"row 1, column 1 \(from 0\) is 'zero': give Full"),
    (lambda: Table([[None]]), r"row 0, column 0 \(from 0\) is None"),
    (lambda: Table([Z]), r"cells=\[Zero\(none=False\)\]: give a sequence of rows"),
    (lambda: Table(Z), r"cells=Zero\(none=False\): give a sequence of rows"),
    (lambda: Table([[Z]], ranks=1), "ranks=1: give a slice"),
    (lambda: Table(FIGURE_3).plan(Facts(4), 0), "the table has 5 rows, the model 4 convolutions"),
    (lambda: Table([[F], [F]], slice(1, 2)).plan(Facts(1), 0), "2 rows, the model 1"),
    (lambda: combine(Static, Approximation(Z)), "combine's first=<class.*: give a schedule"),
    (lambda: combine(Approximation(Z), Plan()), r"combine's second=Plan\(\): give a schedule"),
]


@pytest.mark.parametrize("make,message", REFUSED, ids=range(len(REFUSED)))
def test_refusals(make, message):
    with pytest.raises(PlanError, match=message):
        make()


# --- combine -------------------------------------------------------------------------------------


def prefixed(until, **methods):
    return Constant(Plan(local=LocalPrefix(until, Freeze()), weight_grads=methods))


def test_combine_knows_every_part_of_a_plan():
    parts = {"local", "weight_grads", "modules", "checkpoint", "drop"}
    assert {part.name for part in dataclasses.fields(Plan)} == parts


def test_combined_plans_have_the_parts_of_both():
    first, second = Approximation(Z, slice(1, 3)), Approximation(A, slice(4, None))
    both = {"c1": Z, "c2": Z, "c4": A, "c5": A}
    assert combine(first, second).plan(SIX, 0) == Plan(weight_grads=both)
    assert combine(first, first).plan(SIX, 0) == first.plan(SIX, 0)
    modules = LocalModules(2, num_classes=2)
    split = combine(Constant(Plan(modules=modules)), first).plan(SIX, 0)
    assert split == Plan(weight_grads={"c1": Z, "c2": Z}, modules=modules)
    local = LocalPrefix(2, Freeze())
    expected = Plan(local=local, weight_grads={"c2": Z, "c4": A, "c5": A})
    for nested in (
        combine(prefixed(2), combine(first, second)),
        combine(combine(second, prefixed(2)), first),
        combine(combine(second, first), prefixed(2)),
        combine(prefixed(2, c4=A, c5=A), first),
    ):
        assert nested.plan(SIX, 0) == expected


def test_combine_hands_on_epoch_step_and_rank():
    class Asked:
        def plan(self, analysis, epoch, step=0, rank=0):
            return Plan(weight_grads={f"{epoch} {step} {rank}": Z})

    schedule = combine(Asked(), Plateau(combine(Constant(), Asked())))
    assert list(schedule.plan(SIX, 3, 4, 5).weight_grads) == ["3 4 5"]


def test_combine_refuses_what_contradicts():
    one, other = Approximation(Z), Approximation(A, slice(5, None), batches=slice(1, None))
    schedule = combine(one, other)
    schedule.plan(SIX, 0, step=0)
    asked = r"first asks for Zero\(none=False\) in layer 'c5', the second for TopK\(k=1"
    with pytest.raises(PlanError, match=asked):
        schedule.plan(SIX, 0, step=1)
    with pytest.raises(PlanError, match=r"combine\(.*in layer 'c5', the second for Full\(\)"):
        combine(one, Constant(Plan(weight_grads={"c5": Full()}))).plan(SIX, 0)
    asked = r"combine\(.*both ask for a local prefix, .*LocalPrefix\(until=2.*LocalPrefix\(until=3"
    with pytest.raises(PlanError, match=asked):
        combine(prefixed(2), prefixed(3)).plan(SIX, 0)


def test_methods_inside_the_prefix_are_dropped():
    analysis = fxlocal.analyze(NETS["residual"].build())
    convs = [layer.path for layer in analysis.layers][:-1]
    static = Static(4, "linear", largest=0.8, start=0, rule=Freeze(), align=False)
    schedule = combine(Approximation(Z, slice(0, None)), static)
    boundaries = [static.boundary(analysis, epoch) for epoch in range(4)]
    assert boundaries == [1, 2, 4, 5]
    for epoch, boundary in enumerate(boundaries):
        plan = schedule.plan(analysis, epoch)
        assert plan.local == static.plan(analysis, epoch).local
        assert plan.weight_grads == dict.fromkeys(convs[boundary:], Z)
    named = combine(prefixed("block2"), Approximation(Z)).plan(analysis, 0)  # a path, a fraction
    assert list(named.weight_grads) == ["block2.shortcut.0"]
    assert combine(prefixed(0.5), Approximation(Z)).plan(analysis, 0).weight_grads == {convs[5]: Z}


def test_a_module_called_on_both_sides_of_the_boundary_keeps_its_method():
    analysis = fxlocal.analyze(NETS["shared"].build())  # stem, conv, conv, fc
    schedule = combine(prefixed(2), Approximation(Z, slice(0, None)))
    assert schedule.plan(analysis, 0).weight_grads == {"conv": Z}


def test_a_combination_learns_where_a_part_does():
    plain = combine(Approximation(Z), Static(3, weak_supervision=False))
    assert not isinstance(plain, LearningSchedule)
    assert not plain.weak_supervision and combine(Static(3), plain).weak_supervision
    assert Plateau(Static(3)).weak_supervision and not Plateau(plain).weak_supervision

    def build():
        return combine(combine(Approximation(Z), Dynamic(9, alpha=1)), Plateau(Constant(), 1))

    schedule, again = build(), build()
    for norm, loss in ((1.0, 3.0), (0.5, 2.0), (0.25, 2.5)):
        schedule.end_epoch(SIX, norm, loss)
    assert schedule.first.second.update_norms == [1.0, 0.5, 0.25]
    assert (schedule.second.losses, schedule.second.switch) == ([3.0, 2.0, 2.5], 3)
    assert again.plan(SIX, 9) != schedule.plan(SIX, 9)
    again.load_state_dict(schedule.state_dict())
    assert again.plan(SIX, 9) == schedule.plan(SIX, 9)
    assert again.state_dict() == schedule.state_dict()
