"""Layers asked for by another name, or where a leaf module hides them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlocal
from fxlocal import Freeze, LocalPrefix, Plan, PlanError, Random, Zero


class Held(nn.Module):
    """Layers 0 to 3: stem, tower.a, tower.b, head; each is held by one more name or two."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.tower = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 2)
        self.backbone = self.tower
        self.all = nn.ModuleList([self.stem, *self.tower.values(), self.head])

    def forward(self, x):
        for layer in (self.stem, *self.tower.values()):
            x = torch.relu(layer(x))
        return self.head(x)


class Bare(nn.Module):
    """Layers 0 and 1, by bare parameters that are held by two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(4, 4)) for _ in "ab")
        self.other = self.second

    def forward(self, x):
        return F.linear(torch.relu(F.linear(x, self.first)), self.second)


class Mixed(nn.Module):
    """``late`` also holds ``early``, which runs before the layer that only it holds."""

    def __init__(self):
        super().__init__()
        self.early, self.middle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.late = nn.Sequential(self.early, nn.Linear(4, 4))

    def forward(self, x):
        return self.late[1](torch.relu(self.middle(self.early(x))))


NAMES = [
    (Held, "backbone", 1, "tower.a"),
    (Held, "backbone.a", 1, "tower.a"),
    (Held, "backbone.b", 2, "tower.b"),
    (Held, "all.2", 2, "tower.b"),
    (Held, "all.3", 3, "head"),
    (Held, "all", 0, "stem"),
    (Bare, "other", 1, "second"),
    (Mixed, "late.0", 0, "early"),
]


@pytest.mark.sample(4)
@pytest.mark.parametrize("make,name,index,path", NAMES)
def test_another_name_means_the_same_layer(make, name, index, path):
    model = make()
    assert fxlocal.analyze(model).boundary(name) == index
    plans = [Plan(local=LocalPrefix(until=p, rule=Freeze())) for p in (name, path)]
    if name not in ("backbone", "all"):
        plans += [Plan(weight_grads={p: Zero()}) for p in (name, path)]
    texts = [fxlocal.format_graph(fxlocal.transform(model, plan)) for plan in plans]
    assert texts[0] == texts[1] and texts[2:3] == texts[3:]


def test_another_name_reaches_the_weight_and_verify_sees_it():
    torch.manual_seed(0)
    model = Held()
    net = fxlocal.transform(model, Plan(weight_grads={"all.1": Zero(), "backbone.b": Zero()}))
    net(torch.randn(3, 4)).sum().backward()
    grads = [bool(layer.weight.grad.any()) for layer in model.all]
    assert grads == [True, False, False, True]
    assert not fxlocal.verify(net, torch.randn(3, 4)).layers[1].gradient


def test_another_name_means_the_same_layer_of_an_exported_graph():
    class Exported(Held):
        def forward(self, x):
            return super().forward(x if x.shape[0] > 1 else x + 1)

    analysis = fxlocal.analyze(Exported(), torch.randn(3, 4))
    assert [analysis.boundary(f"all.{i}") for i in range(4)] == [0, 1, 2, 3]


def test_two_names_of_one_layer_ask_for_one_weight_gradient():
    same = Plan(weight_grads={"all.2": Zero(), "tower.b": Zero()})
    fxlocal.transform(Held(), same)
    with pytest.raises(PlanError, match=r"'tower\.b'.*'all\.2' is another name of the same layer"):
        fxlocal.transform(Held(), Plan(weight_grads={"all.2": Zero(), "tower.b": Random(0.5)}))


def test_a_name_of_two_places_is_refused():
    with pytest.raises(PlanError, match=r"until='late'.*'early'.*'late\.1'.*one of these"):
        fxlocal.transform(Mixed(), Plan(local=LocalPrefix(until="late", rule=Freeze())))


# --- inside a leaf --------------------------------------------------------------------------------


class Leafy(nn.Module):
    """Layers around a module of torch's own that is kept whole."""

    def __init__(self, leaf):
        super().__init__()
        self.embed, self.part = nn.Linear(4, 8), nn.ModuleDict({"leaf": leaf})
        self.again, self.fc = self.part["leaf"], nn.Linear(8, 2)

    def forward(self, x):
        x = self.embed(x)
        leaf = self.part["leaf"]
        y = leaf(x, x, x) if isinstance(leaf, nn.MultiheadAttention) else leaf(x)
        return self.fc(y[0] if isinstance(y, tuple) else y)


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


LEAVES = {
    "encoder layer": (encoder, "part.leaf.layers.1"),
    "deep inside": (encoder, "part.leaf.layers.0.linear1"),
    "projection of attention": (lambda: nn.MultiheadAttention(8, 2), "part.leaf.out_proj"),
    "the leaf": (lambda: nn.TransformerEncoderLayer(8, 2, 16), "part.leaf"),
    "what holds it": (encoder, "part"),
    "its other name": (encoder, "again.layers.1"),
}


@pytest.mark.parametrize("name", LEAVES)
def test_a_path_inside_a_leaf_is_refused_for_that_reason(name):
    make, path = LEAVES[name]
    plans = Plan(local=LocalPrefix(until=path, rule=Freeze())), Plan(weight_grads={path: Zero()})
    for plan in plans:
        with pytest.raises(PlanError) as refusal:
            fxlocal.transform(Leafy(make()), plan)
        leaf = "again" if path.startswith("again") else "part.leaf"
        for words in (repr(path), f"{leaf!r} is a leaf", "'embed' before it", "'fc' behind it"):
            assert words in str(refusal.value)


def test_an_unknown_path_outside_a_leaf_is_unknown():
    with pytest.raises(PlanError, match="no such layer or block"):
        fxlocal.transform(Leafy(encoder()), Plan(local=LocalPrefix(until="part2.leaf")))
