"""Boundaries where a model has few legal ones, or none."""

import pytest
import torch
from torch import nn

import fxlocal
from fxlocal import BoundaryWarning, Driver, Freeze, LocalPrefix, NoEffectWarning, Plan, PlanError
from fxlocal.schedules import Constant, Dynamic, Plateau, Static, combine


class Branches(nn.Module):
    """Two branches all the way, each of which reads the other."""

    def __init__(self, tied=False):
        super().__init__()
        self.a = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.b = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        if tied:
            self.b[2].weight = self.a[0].weight

    def forward(self, x, y):
        x = y = x + y
        for a, b in zip(self.a, self.b, strict=True):
            x, y = torch.relu(a(x - y)), torch.relu(b(x * y))
        return x + y


class Tower(nn.Module):
    """Linear layers in a row, some of which share a weight."""

    def __init__(self, *tied, count=6):
        super().__init__()
        self.row = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        for i in tied[1:]:
            self.row[i].weight = self.row[tied[0]].weight

    def forward(self, x):
        for layer in self.row:
            x = torch.relu(layer(x))
        return x


class Repeated(nn.Module):
    """One layer, called again and again."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(4):
            x = torch.relu(self.layer(x))
        return x


def frozen(until):
    return Plan(local=LocalPrefix(until=until, rule=Freeze()))


NONE = {
    "tied branches": (lambda: Branches(tied=True), 0.5, "until=3 or until='b.1'"),
    "tied from end to end": (lambda: Tower(0, 5), 0.5, "until=3 or until='row.3'"),
    "one layer again and again": (Repeated, 0.75, "until=3 or until='layer'"),
}


@pytest.mark.parametrize("name", NONE)
def test_a_fraction_of_a_model_without_legal_edges_is_refused(name):
    make, until, instead = NONE[name]
    model = make()
    assert fxlocal.analyze(model).boundaries == (0,)
    with pytest.raises(PlanError, match="none behind its first layer") as refusal:
        fxlocal.transform(model, frozen(until))
    assert instead in str(refusal.value)


def test_a_fraction_of_less_than_a_layer_and_one_before_the_first_edge_mean_no_boundary():
    assert fxlocal.analyze(Branches()).boundary(0.1) == 0
    assert fxlocal.analyze(Tower(0, 3)).boundary(0.5) == 0  # legal ones: 4 and 5


@pytest.mark.parametrize("tied,until", [((0, 3), 0.5), ((0, 4), 0.75), ((0, 2), 0.2)])
def test_a_network_without_the_prefix_that_was_asked_for_says_so(tied, until):
    first = tied[1] + 1
    with pytest.warns(NoEffectWarning, match=rf"no layer is local.* {first} \('row\.{first}'\)"):
        fxlocal.transform(Tower(*tied), frozen(until))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tied,until", [((0, 3), 0.7), ((0, 3), 0.1), ((0, 3), 0), ((), 0.5)])
def test_a_network_with_it_says_nothing(tied, until):
    fxlocal.transform(Tower(*tied), frozen(until))


def test_an_index_still_cuts_through_branches():
    model = Branches()
    net = fxlocal.transform(model, frozen(2))
    net(torch.ones(2, 4), torch.ones(2, 4)).sum().backward()
    assert [layer.weight.grad is None for layer in (*model.a, *model.b)] == [
        True, False, False, True, False, False,
    ]  # fmt: skip


SCHEDULES = Static(epochs=4, rule=Freeze(), start=0.0), Dynamic(epochs=4, rule=Freeze())


@pytest.mark.parametrize("make", [lambda: Branches(tied=True), lambda: Tower(0, 5), Repeated])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_that_could_never_move_is_refused(make, schedule):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PlanError, match=r"none behind the first layer.*align=False"):
        Driver(model, schedule, optimizer)


TIED = {
    "in the middle": ((1, 3), 2, r"Nearest legal ones: 1 \('row\.1'\), 4 \('row\.4'\), 5"),
    "just before the second": ((1, 3), 3, r"Nearest legal ones: 1 \('row\.1'\), 4"),
    "from the start": ((0, 2), 1, r"Nearest legal ones: 3 \('row\.3'\), 4 \('row\.4'\), 5"),
    "three of them": ((1, 2, 4), 3, r"Nearest legal ones: 1 \('row\.1'\), 5 \('row\.5'\)"),
    "from end to end": ((0, 5), 2, "Nearest legal ones: none"),
}


@pytest.mark.parametrize("name", TIED)
def test_a_boundary_between_tied_weights_names_the_nearest_legal_ones(name):
    tied, until, message = TIED[name]
    with pytest.raises(PlanError, match=rf"must lie on one side.*{message}"):
        fxlocal.transform(Tower(*tied), frozen(until))
    for edge in fxlocal.analyze(Tower(*tied)).boundaries:
        fxlocal.transform(Tower(*tied), frozen(edge))


FAR = {
    "before a tie": ((3, 12), 14, 0.75, 3, "3 layers are local where 10.5 of 14"),
    "two ties": ((2, 8, 14), 16, 0.8, 2, r"are 1 \('row\.1'\), 2 \('row\.2'\), 15"),
    "a tie up to the last": ((5, 19), 20, 0.5, 5, "5 layers are local where 10 of 20"),
}


@pytest.mark.parametrize("name", FAR)
def test_a_boundary_far_from_the_fraction_that_was_asked_for_warns(name):
    tied, count, until, edge, message = FAR[name]
    model = Tower(*tied, count=count)
    with pytest.warns(BoundaryWarning, match=rf"until={until}: .*{message}"):
        net = fxlocal.transform(model, frozen(until))
    assert len(net.meta["prefix"]) == 2 * edge


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("until", [0.15, 0.35, 0.8, 6, "row.6", 0.36])
def test_one_within_fifteen_hundredths_of_the_layers_does_not(until):
    fxlocal.transform(Tower(3, 5, count=14), frozen(until))


FREEZE = Freeze()
FAR_SCHEDULES = {
    "Static": Static(epochs=4, rule=FREEZE, start=0.0),
    "Dynamic": Dynamic(epochs=9, rule=FREEZE),
    "a constant fraction": Constant(frozen(0.6)),
    "combined": combine(Constant(Plan()), Static(epochs=3, rule=FREEZE, start=0.0)),
    "until a plateau": Plateau(Static(epochs=3, rule=FREEZE, start=0.0), patience=2),
}


@pytest.mark.parametrize("name", FAR_SCHEDULES)
@pytest.mark.parametrize("tied,kind", [((3, 17), BoundaryWarning), ((0, 17), NoEffectWarning)])
def test_a_schedule_whose_boundary_stays_far_behind_warns_once(name, tied, kind):
    model = Tower(*tied, count=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning) as seen:
        driver = Driver(model, FAR_SCHEDULES[name], optimizer)
        for _ in range(3):
            driver.start_epoch()
            driver.network()(torch.ones(2, 4)).sum().backward()
            driver.end_epoch()
    far = [one for one in seen if one.category in (BoundaryWarning, NoEffectWarning)]
    assert [(one.category, one.filename) for one in far] == [(kind, __file__)]


@pytest.mark.filterwarnings("error::fxlocal.BoundaryWarning", "error::fxlocal.NoEffectWarning")
@pytest.mark.parametrize("name", FAR_SCHEDULES)
def test_a_schedule_that_has_its_edges_does_not(name):
    model = Tower(count=20)
    Driver(model, FAR_SCHEDULES[name], torch.optim.SGD(model.parameters(), lr=0.1))
