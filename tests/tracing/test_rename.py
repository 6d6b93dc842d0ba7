"""Names of a model that mean something else in generated code, or cannot stand there."""

import pytest
import torch
from torch import nn

import fxlocal
from fxlocal import CaptureError, Checkpoint, Freeze, LocalPrefix, Plan

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Child(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.Linear(4, 4))
        self.last, self.chosen = nn.Linear(4, 4), name

    def forward(self, x):
        return self.last(self._modules[self.chosen](x))


class State(nn.Module):
    def __init__(self, name, parameter):
        super().__init__()
        value = torch.randn(4)
        if parameter:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)
        self.first, self.last, self.chosen = nn.Linear(4, 4), nn.Linear(4, 4), name

    def forward(self, x):
        return self.last(self.first(x) + getattr(self, self.chosen))


KINDS = {
    "child": Child,
    "grandchild": lambda name: nn.Sequential(Child(name)),
    "parameter": lambda name: State(name, True),
    "buffer": lambda name: State(name, False),
}
NEVER = ["lambda", "None", "a'b", 'a"b', "a\\b", "a\nb"]
AT_THE_ROOT = [
    "self",
    "code",
    "_source",
    "fxlocal",
    "meta",
    "_graph",
    "additions",
    "history",
    "shape_env",
    "print_readable",
]


@pytest.mark.sample(30)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NEVER, *AT_THE_ROOT])
def test_a_name_works_or_is_refused(kind, name):
    model = KINDS[kind](name)
    until = "0.last" if kind == "grandchild" else "last"
    if name in NEVER or kind != "grandchild":
        with pytest.raises(CaptureError, match="rename") as refusal:
            fxlocal.transform(model, Plan(local=LocalPrefix(until=until, rule=Freeze())))
        assert repr(name) in str(refusal.value)
    else:
        network = fxlocal.transform(model, Plan(local=LocalPrefix(until=until, rule=Freeze())))
        assert torch.equal(network(X), model(X))


@pytest.mark.sample(16)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["1x1", "match", "source", "device", "nan", "input", "a-b", "é"])
def test_an_odd_name_that_means_nothing_works(kind, name):
    model = KINDS[kind](name)
    assert torch.equal(fxlocal.transform(model, Plan())(X), model(X))


def by_shape(x):
    """Needs example inputs, so that `torch.export` is tried."""
    return x if x.shape[1] == 4 else x[:, :4]


class ExportedChild(Child):
    def forward(self, x):
        return super().forward(by_shape(x))


class ExportedState(State):
    def forward(self, x):
        return super().forward(by_shape(x))


EXPORTED = {
    "child": ExportedChild,
    "parameter": lambda name: ExportedState(name, True),
    "buffer": lambda name: ExportedState(name, False),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", EXPORTED)
@pytest.mark.parametrize("name", ["lambda", "await", "a'b", "meta", "_code", "recompile"])
def test_so_it_is_where_torch_export_would_stumble_over_it(kind, name):
    with pytest.raises(CaptureError, match=f"(?s){name}.*rename"):
        fxlocal.transform(EXPORTED[kind](name), Plan(), X)


class Moved(Child):
    def forward(self, x, device):
        return self.last(self.first(x).to(X.device)) + device


class Nan(Child):
    def forward(self, x, nan):
        return self.last(self.first(x)).masked_fill(nan > 0, float("nan"))


class Infinite(Child):
    def forward(self, x, inf):
        return self.last(self.first(x)).clamp(min=-float("inf")) + inf


class Sliced(Child):
    def forward(self, x, slice):
        return self.last(self.first(x)[:, 0:4]) + slice


class Torch(Child):
    def forward(self, x, torch):
        return self.last(self.first(x).relu()) + torch


class Exported(Child):
    def forward(self, x, torch):
        return self.last(by_shape(self.first(x).relu())) + torch


SHADOWS = {Moved: "device", Nan: "nan", Infinite: "inf", Sliced: "slice"}
SHADOWS |= {Torch: "torch", Exported: "torch"}
PLANS = {"nothing": Plan(), "checkpoint": Plan(checkpoint=Checkpoint(2))}


@pytest.mark.sample(5)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("kind", SHADOWS)
def test_an_input_by_whose_name_code_means_something_else_works(kind, plan):
    model = kind("first")
    network = fxlocal.transform(model, Plan() if kind is Exported else plan, X, X)
    run = torch.compile(network, backend="eager", fullgraph=True)
    for one in (network, run):
        torch.testing.assert_close(one(X, **{SHADOWS[kind]: X}), model(X, X), equal_nan=True)
    torch.testing.assert_close(network.eval()(X, X), model(X, X), equal_nan=True)


class Plain(Child):
    def forward(self, x, device, nan, inf, slice):
        return self.last(x) + device + nan + inf + slice


def test_such_an_input_works_where_code_does_not_use_the_name():
    model = Plain("first")
    network = fxlocal.transform(model, Plan())
    assert torch.equal(network(X, device=X, nan=X, inf=X, slice=X), model(X, X, X, X, X))


class Handed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)


class Args(Handed):
    def forward(self, *args):
        return self.inner(*args)


class Keywords(Handed):
    def forward(self, x, **options):
        return self.inner(x if x.sum() > 0 else -x)


class Both(Handed):
    def forward(self, *args, **options):
        return self.inner(*args, **options)


@pytest.mark.parametrize(
    ("kind", "inputs"), [(Args, ()), (Keywords, ()), (Both, ()), (Keywords, (X,))]
)
def test_a_forward_that_hands_on_what_it_gets_says_to_give_the_model_inside(kind, inputs):
    with pytest.raises(CaptureError, match="give the model inside"):
        fxlocal.capture(kind(), *inputs)


class Several(Handed):
    def __init__(self):
        super().__init__()
        self.inner, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, **options):
        return self.other(self.inner(x) if x.sum() > 0 else x)


def test_a_branch_by_values_says_that_a_backend_may_rewrite_what_lies_before_it():
    with pytest.raises(CaptureError, match=r"fxlocal\.backend\(plan\)") as told:
        fxlocal.capture(Several(), X)
    assert "model inside" not in str(told.value)
