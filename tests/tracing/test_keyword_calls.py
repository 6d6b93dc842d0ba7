"""Whatever takes a batch takes it by keyword: local modules, drivers, compiled networks."""

import copy
import functools
import inspect
import pickle
import warnings

import pytest
import torch
from support import laws
from support.keyword_nets import BOTH_WAYS, EACH, IDS, LABELS, MASK, PREFIX, Net, Text, X, build
from torch import nn

import fxlocal
from fxlocal import Checkpoint, Hebbian, LocalModules, LocalPrefix, Plan, Zero
from fxlocal.runtime.compile import ByModule
from fxlocal.schedules import Constant


def modules(count=2, **more):
    return Plan(modules=LocalModules(count, num_classes=3, balance=("second",), **more))


class Vision(Net):
    """Has optional inputs where a target would be bound."""

    def forward(self, x, mask=None, causal=False):
        return self.layers(x if mask is None else x * mask)


@BOTH_WAYS
def test_the_target_stands_behind_the_inputs_of_the_example(by_shape):
    net = fxlocal.transform(Vision(by_shape), modules(), X)
    assert str(inspect.signature(net.forward)) == "(x, target=None, mask=None, causal=False)"
    (output, loss), (_, named) = net(X, LABELS), net(X, target=LABELS)
    assert torch.equal(output, Vision(by_shape)(X))
    assert torch.equal(loss, named)
    assert not fxlocal.verify(net, X, LABELS).unmet
    assert set(fxlocal.find_stages(net)[0].inputs) == {"x", "target"}
    for wrong in (lambda: net(X, LABELS, X), lambda: net(X, LABELS, mask=X)):
        with pytest.raises(RuntimeError, match="captured with None"):
            wrong()
    with pytest.raises(ValueError, match=r"no target: .* net\(x, target\)"):
        net(X)
    assert torch.equal(net.eval()(X), Vision(by_shape)(X))
    assert torch.equal(net(X, mask=X), Vision(by_shape)(X, X))


@BOTH_WAYS
def test_the_target_stands_behind_given_optional_inputs(by_shape):
    net = fxlocal.transform(Vision(by_shape), modules(), X, X)
    assert torch.equal(net(X, X, LABELS)[0], Vision(by_shape)(X, X))
    given_none = fxlocal.transform(Vision(by_shape), modules(), X, None)
    assert torch.equal(given_none(X, None, LABELS)[0], Vision(by_shape)(X))
    text = fxlocal.transform(Text(by_shape), modules(), ids=IDS, mask=MASK)
    assert torch.equal(text(IDS, MASK, LABELS)[0], Text(by_shape)(IDS, MASK))
    assert torch.equal(text(mask=MASK, ids=IDS, target=LABELS)[0], Text(by_shape)(IDS, MASK))
    assert not fxlocal.verify(text, target=LABELS, mask=MASK, ids=IDS).unmet


@BOTH_WAYS
def test_modules_that_are_compiled_one_by_one_take_keywords(by_shape):
    net = fxlocal.transform(Text(by_shape), modules(), ids=IDS, mask=MASK)
    compiled = ByModule(net, {"backend": "eager"})
    ours, theirs = compiled(ids=IDS, mask=MASK, target=LABELS), net(IDS, MASK, LABELS)
    laws.assert_equal(ours, theirs, "output and loss")
    with pytest.raises(RuntimeError, match="captured with None"):
        compiled(ids=IDS, mask=MASK, types=IDS, target=LABELS)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "plan",
    [
        PREFIX,
        Plan(local=LocalPrefix(until=1, rule=Hebbian(0.01))),
        Plan(weight_grads={"second": Zero()}),
        Plan(checkpoint=Checkpoint(2)),
    ],
    ids=["freeze", "hebbian", "zero", "checkpoint"],
)
@EACH
def test_every_plan_is_driven_compiled_and_pickled_with_such_a_batch(case, plan):
    model, batch = build(case, False)
    eager = copy.deepcopy(model)
    if plan.weight_grads:
        path = next(name for name, _ in model.named_modules() if name.endswith("second"))
        plan = Plan(weight_grads={path: Zero()})
    driver = fxlocal.Driver(model, Constant(plan), example_inputs=batch)
    driver.start_epoch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of approximations that gain nothing
        net = fxlocal.transform(copy.deepcopy(model), plan, **batch)
    whole = torch.compile(net, backend="eager", fullgraph=True)
    again = pickle.loads(pickle.dumps(fxlocal.transform(copy.deepcopy(model), PREFIX, **batch)))
    for call in (driver.network(), net, whole, again, copy.deepcopy(net)):
        if plan.local is None or not plan.rate:
            laws.assert_equal(laws.tensors(call(**batch)), laws.tensors(eager(**batch)), "output")
        else:
            call(**batch)
    with pytest.raises((RuntimeError, TypeError), match=r"captured with|unexpected keyword"):
        again(**{**batch, **{"image": {"flip": True}}.get(case, {"types": IDS[:, 0]})})


class Caching(Text):
    """Fills a table in its first call."""

    table = None

    def forward(self, ids=None, mask=None, labels=None):
        if self.table is None:
            self.table = torch.arange(ids.shape[1]) / 9
        return super().forward(
            ids, self.table if mask is None else mask * self.table, labels=labels
        )


@BOTH_WAYS
def test_a_cache_that_the_first_call_fills_is_found_with_keywords(by_shape):
    net = fxlocal.transform(Caching(by_shape), Plan(), labels=LABELS, ids=IDS)
    theirs = Caching(by_shape)(labels=LABELS, ids=IDS)
    laws.assert_equal(laws.tensors(net(IDS, labels=LABELS)), laws.tensors(theirs), "output")


def test_hooks_of_the_model_get_what_they_got_before():
    model, seen = Vision(False), []
    net = fxlocal.transform(model, Plan(), X).eval()
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args)))
    net(X)
    assert seen == [3]


def by_name(function):
    @functools.wraps(function)
    def forward(self, *args, **kwargs):
        if kwargs.get("flag"):
            return function(self, *args, **kwargs) * 2
        return function(self, *args, **kwargs)

    return forward


class Flagged(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    @by_name
    def forward(self, x, flag=False):
        return self.last(self.first(x))


@pytest.mark.parametrize("train", [True, False])
def test_what_a_decorator_looks_for_by_name_is_given_so(train):
    model = Flagged().train(train)
    x = torch.randn(3, 4)
    net = fxlocal.transform(model, Plan(), x, flag=True)
    assert torch.equal(net(x, flag=True), model(x, flag=True))
    assert not torch.equal(model(x, flag=True), model(x))


def doubling_named(forward):
    @functools.wraps(forward)
    def doubled(self, *args, **kwargs):
        return forward(self, *args, **{name: 2 * value for name, value in kwargs.items()})

    return doubled


def other_order(forward):
    @functools.wraps(forward)
    def turned(self, m, x):
        return forward(self, x, m)

    return turned


class Masked(Flagged):
    @doubling_named
    def forward(self, x, m):
        return self.last(self.first(x) * m)


class MaskedMaybe(Flagged):
    @doubling_named
    def forward(self, x, m=None):
        return self.last(self.first(x) * m)


class Turned(Flagged):
    @other_order
    def forward(self, x, m):
        return self.last(self.first(x) * m)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("names", ["", "m", "xm"])
@pytest.mark.parametrize("kind", [Masked, MaskedMaybe, Turned])
def test_a_decorator_gets_arguments_as_the_example_gives_them(kind, names, train):
    model, given = kind().train(train), {"x": torch.randn(3, 4), "m": torch.rand(3, 4)}
    if kind is Turned and names != "xm":
        pytest.skip("the decorator takes them in another order than its signature says")
    args = [value for name, value in given.items() if name not in names]
    kwargs = {name: value for name, value in given.items() if name in names}
    net = fxlocal.transform(model, Plan(), *args, **kwargs)
    assert torch.equal(net(*args, **kwargs), model(*args, **kwargs))


def test_what_a_decorator_takes_besides_is_told_of():
    with pytest.raises(TypeError, match=r"argument 'flags'\. What a decorator of it takes besides"):
        fxlocal.transform(Flagged(), Plan(), torch.randn(3, 4), flags=True)


class ByPosition(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    @by_name
    def forward(self, x, scale=2.0, /):
        return self.last(self.first(x)) * scale


class WithRest(ByPosition):
    def forward(self, x, bias=None, *rest):
        return self.last(self.first(x)) + sum(rest)


@pytest.mark.parametrize("train", [True, False])
def test_what_can_be_given_by_position_alone_is(train):
    x = torch.randn(3, 4)
    for model, inputs in ((ByPosition(), (x,)), (WithRest(), (x, None, torch.ones(1)))):
        net = fxlocal.transform(model.train(train), Plan(), *inputs)
        assert torch.equal(net(*inputs), model(*inputs))
